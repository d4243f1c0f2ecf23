"""Many processes: who they are, how they meet, and what they send each other."""
