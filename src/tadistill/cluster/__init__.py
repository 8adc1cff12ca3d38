"""Run a study on a Slurm cluster. The modules describe clusters, turn the stages of a study into jobs, submit the jobs and show their
state.
"""
