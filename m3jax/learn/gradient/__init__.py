"""The gradient in the coefficients: a pull-back of the merge, tensor by tensor."""
