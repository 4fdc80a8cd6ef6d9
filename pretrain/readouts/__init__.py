"""Readouts: ridge regressions of the proxies on the features of an encoder, fitted on the people of a pretraining."""
