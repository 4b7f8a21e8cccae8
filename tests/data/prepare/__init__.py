"""Each data set from small files in its owners' format."""
