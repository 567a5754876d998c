"""PAMM and MTMamba: one image in, segmentation, parts, depth, normals, saliency and boundaries out."""
