"""A Chinese image-QA data set: collect, generate, clean, publish; `data.zh.build` runs the chain."""
