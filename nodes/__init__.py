"""The nodes: one file per station of the road."""
