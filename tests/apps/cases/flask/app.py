from flask import Flask

app = Flask(__name__)


@app.route("/d/")
def folder():
    return "the folder"
