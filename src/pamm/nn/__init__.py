"""Parts that more than one paper uses: scan orders and the parameters of the state space model."""
