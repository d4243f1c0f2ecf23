"""Other libraries' names over this one's operations: what trains with them gets the speed by changing an import."""
