"""The server: an API that every client speaks, and the page that shows who speaks."""
