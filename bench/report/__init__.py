"""Results as pages and pictures: inline SVG, HTML, and README's table."""
