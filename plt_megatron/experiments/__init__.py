"""What is done with whole runs: the demo, reading their metrics, plots."""
