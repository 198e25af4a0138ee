"""One module per public dataset, run as ``python -m preprocessing.<dataset>``; each ends in a datalist."""
