import { word } from './word.js';

const show = () => (document.getElementById('word').textContent = `word: ${word}`);
show();
import.meta.webpackHot.accept('./word.js', show);
