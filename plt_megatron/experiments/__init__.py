"""Work with whole runs: the demo, sweeps and their reports, diagnostics, plots."""
