"""Run a study on a Slurm cluster: profiles of clusters, jobs of a plan, their submission and their state."""
