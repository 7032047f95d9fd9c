"""What is done to finished frames. Nothing here is Wan."""
