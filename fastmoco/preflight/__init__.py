"""What processes on several nodes need of network, clocks and disks, measured before they train."""
