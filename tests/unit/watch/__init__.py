"""Tests of the page that watches a study (a package, so that they can share `folder`)."""
