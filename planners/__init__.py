"""What nnU-Net calls a planner."""
