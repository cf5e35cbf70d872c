"""Tests of the bench room: that it reads its tools rightly and is honest about noise."""
