'use client';

import { useState } from 'react';

export default function Page() {
  const [count, setCount] = useState(0);
  return (
    <>
      <p>word: first</p>
      <button onClick={() => setCount(count + 1)}>count {count}</button>
    </>
  );
}
