"""Clusters: what their login nodes are asked to do before jobs run, since many compute nodes have no network."""
