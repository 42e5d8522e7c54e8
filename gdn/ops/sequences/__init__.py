"""What operators over sequences share: the walk over chunks of many sequences, buffers, sums of log decays, rows of a pool of states, the
host of recurrences in Triton."""
