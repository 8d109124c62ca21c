"""Inside a Slurm job: one launcher per node that checks, starts and watches the processes that train."""
