"""Run a study on a Slurm cluster: profiles of sites, jobs of a plan, their submission and their state (docs/reference/cluster.md)."""
