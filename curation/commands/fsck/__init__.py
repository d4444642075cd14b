"""``fsck``: what is wrong with tar shards, and every whole sample out of damaged ones (**salvage**)."""
