"""What may be believed: levels of verification, submissions, reproductions, and the page of results."""
