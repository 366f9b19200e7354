"""`dolly web`: a page for people, in Chinese and English. Only page.py, and launch.py when it serves, import gradio."""
