"""What is run on a GPU that this project has not met before: see README.md."""
