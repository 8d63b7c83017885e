"""The networks: TIGER's T5 and SASRec, with their tokens and CPU kernels."""
