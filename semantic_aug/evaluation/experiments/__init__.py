"""What synthetic images do to a classifier: comparisons and searches over the three stages."""
