"""What answers are based on: versioned documents, and the search for those that a request needs."""
