"""In-job launcher: starts a run's processes inside a job and keeps them running.

The rest of the code uses `node.launch_node`, `finalize.finalize_job` and `watchdog.start_watchdog`.
"""
