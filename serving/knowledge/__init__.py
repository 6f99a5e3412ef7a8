"""What answers are given from: versioned documents, and the search for those that a request needs."""
