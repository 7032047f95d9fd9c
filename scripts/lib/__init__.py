"""What the commands beside this folder, the training and the tests share."""
