import { word } from './word.js';

const show = (text) => (document.getElementById('word').textContent = `word: ${text}`);
show(word);
import.meta.hot.accept('./word.js', (anew) => show(anew.word));
