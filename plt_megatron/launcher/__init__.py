"""Keeps a run's processes running inside a job.

The rest of the code uses `node.launch_node`, `finalize.finalize_job` and `watchdog.start_watchdog`.
"""
