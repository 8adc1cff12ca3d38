"""Tests of the report package (a package, so that they can share `builder`)."""
