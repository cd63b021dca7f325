"""Tables, goals and figures from the JSONs of benchmark runs."""
