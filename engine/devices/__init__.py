"""Where a plan runs: on one GPU or two, recorded or not, or by torch; and the cards there are."""
