export default { title: 'Word' };

export const Word = { render: () => '<p>word: first</p>' };
