"""Tests of the judge package (a package, so that they can share `fake`)."""
