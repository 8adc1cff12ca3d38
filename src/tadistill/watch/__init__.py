"""A local page of a running or finished study. It only reads the study's files, and it reads long logs in pieces."""
