"""``fsck`` finds faults in tar shards, and copies every intact sample out of damaged ones (**salvage**)."""
