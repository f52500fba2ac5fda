"""What a review video shows: what was predicted, which images in which order, and the panels."""
