"""What is learned of a rollout, or of demonstrations: experience, losses, optimizer steps."""
