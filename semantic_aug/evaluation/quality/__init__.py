"""What a synthetic subset is like: faithfulness, diversity, distances, near-copies; filters and pictures."""
