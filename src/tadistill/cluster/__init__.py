"""A study on a Slurm cluster: profiles of sites, the jobs of a plan, their submission and their state (docs/cluster.md)."""
