"""The report of a study: `gather` reads the finished cells, `statistics` puts intervals to them, the sections say what
they show as `blocks`, and `page` and `markdown` write those out."""
