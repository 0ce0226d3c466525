"""Side-by-side runs of skdeq against its peers: one command each, results as Markdown tables."""
