"""The anchor cache: the teacher's hidden states and tokens on anchors, in Parquet, with an identity."""
