"""Images to pairs of views: what there is, in which order it comes, and how it is decoded and transformed."""
